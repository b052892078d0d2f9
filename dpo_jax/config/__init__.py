"""One YAML is one experiment: the schema, the parser and the keys of each command."""
