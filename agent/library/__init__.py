"""What `import longdream` offers: trained agents as Python objects, and functions for what the command line does."""
