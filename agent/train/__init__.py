"""The trainers: online, in imagination, on video."""
