"""Published weights and configs to and from releases: one table of names, shapes and functions per format."""
