"""Dialogues of tutors and learners: turns, tutors, and how good a tutor is."""
