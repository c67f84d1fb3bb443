"""The errors a user sees: what was found, what was expected, where, and what to do."""


class SegtrustError(Exception):
    """Something the user can mend; shown without a traceback."""


class PatientError(SegtrustError):
    """One patient's content cannot be used; other patients are not affected."""


class Problems(SegtrustError):
    """Several independent problems, reported together.

    problems : list of str, one message each
    """

    def __init__(self, problems):
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} found:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def raise_if_any(problems):
    """Raise `Problems` when the list is not empty."""
    if problems:
        raise Problems(problems)
