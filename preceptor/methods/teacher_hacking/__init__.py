"""teacher_hacking: a laboratory that shows whether a student learns the truth or its teacher's mistakes."""
