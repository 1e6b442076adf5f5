"""semantic_revision: a student learns from its own samples, corrected by the teacher."""
