"""A trained run behind an HTTP interface as OpenAI's: `kan serve`."""
