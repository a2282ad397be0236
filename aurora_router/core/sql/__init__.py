"""What a statement does, by its text: a lexer, a reader of queries, the dialects, and the analysis that puts them together."""
