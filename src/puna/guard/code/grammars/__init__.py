"""One table a language: which of the grammar's node types becomes which node of the uniform view. All have the same
parts in the same order: leaves, expressions, statements."""
