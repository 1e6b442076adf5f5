"""The tests of template."""
