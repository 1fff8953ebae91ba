"""The 57 subjects of MMLU (Hendrycks et al., arXiv:2009.03300) and their four categories, as lm-evaluation-harness groups them."""

STEM = """
abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics college_physics computer_security
conceptual_physics electrical_engineering elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
high_school_mathematics high_school_physics high_school_statistics machine_learning
"""
HUMANITIES = """
formal_logic high_school_european_history high_school_us_history high_school_world_history international_law jurisprudence logical_fallacies
moral_disputes moral_scenarios philosophy prehistory professional_law world_religions
"""
SOCIAL_SCIENCES = """
econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_microeconomics high_school_psychology
human_sexuality professional_psychology public_relations security_studies sociology us_foreign_policy
"""
OTHER = """
business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics miscellaneous nutrition
professional_accounting professional_medicine virology
"""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": tuple(STEM.split()),
    "humanities": tuple(HUMANITIES.split()),
    "social_sciences": tuple(SOCIAL_SCIENCES.split()),
    "other": tuple(OTHER.split()),
}

SUBJECTS = tuple(sorted(subject for subjects in CATEGORIES.values() for subject in subjects))


def category_of(subject: str) -> str | None:
    """The category of a subject; None for one that is not MMLU's."""
    return next((category for category, subjects in CATEGORIES.items() if subject in subjects), None)


def heading(subject: str) -> str:
    """What stands above the solved examples of a subject."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
