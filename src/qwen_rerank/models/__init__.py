"""The one door to model folders: which folder a name means, what is refused, and how small files are read."""
