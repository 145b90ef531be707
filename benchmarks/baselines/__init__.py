"""What the guided step and loop are compared with, written here from the method's definition."""
