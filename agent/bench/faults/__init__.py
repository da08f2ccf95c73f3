"""Faults, counted: situations of real users, kills at random moments, and inputs that were tampered with."""
