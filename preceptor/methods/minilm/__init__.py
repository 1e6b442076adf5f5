"""minilm: a student learns the relations of its teacher's attention."""
