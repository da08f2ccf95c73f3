"""The loop and the command line: composes V, M and C into something that acts and learns."""
