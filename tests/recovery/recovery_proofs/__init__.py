"""Proofs that nothing is lost: any layout goes on with what another one saved, and a run that is killed again and again is the run that was not.

corpus: the text of both. layouts, member, verdict: pairs of layouts (one saves, the other goes on). jobs, attempts, evidence, campaign: kills.
"""
