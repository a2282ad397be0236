"""The texts of an error, in which no password may be."""


def everything(error):
    """All texts of an error and of its chain."""
    chain = []
    while error is not None:
        chain += [str(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(chain)
