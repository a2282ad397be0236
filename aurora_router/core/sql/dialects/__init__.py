"""One module per SQL dialect: how its texts are cut up, and what its statements and words mean."""
