"""A user's own pictures: which files they are, and how each becomes an image like those of the data set."""
