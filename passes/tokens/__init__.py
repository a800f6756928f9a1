"""Token reduction: passes that drop or merge visual tokens."""
