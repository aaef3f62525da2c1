"""Documents to a prepared corpus, and what is read from it."""
