"""Images, networks and augmented views."""
