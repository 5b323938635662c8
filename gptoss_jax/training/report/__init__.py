"""What a person looks at after a run, or beside one: a page of figures, tables and samples, of one run or of several side by side."""
