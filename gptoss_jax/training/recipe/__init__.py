"""The whole recipe from one YAML: stages, exported rows, pass rates, gate, and the table that they end in."""
