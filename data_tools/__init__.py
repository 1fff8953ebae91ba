"""From documents to a corpus that a run can read: text shards, a tokenizer, token shards with an index."""
