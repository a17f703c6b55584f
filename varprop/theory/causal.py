CLOSURE_ERROR = 0.01


def has_closure(spec):
    return False


closed_attention = None
