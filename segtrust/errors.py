"""The errors a user sees: what was found, what was expected, where, and what to do."""

from contextlib import contextmanager


class SegtrustError(Exception):
    """Something the user can mend; shown without a traceback."""


class PatientError(SegtrustError):
    """One patient's content cannot be used; other patients are not affected.

    patient, files, coding : of the patient, where a job works on several; None where the job is the patient's own
    """

    patient = files = coding = None


class Problems(SegtrustError):
    """Several independent problems, reported together.

    problems : list of messages, or of errors of patients
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


@contextmanager
def of_patient(patient, files, coding):
    """Let a PatientError say which of several patients it is about, and with what files and coding."""
    try:
        yield
    except PatientError as error:
        error.patient, error.files, error.coding = patient, files, coding
        raise


def patient_errors(error):
    """Return the PatientErrors in an error: itself, or those among several problems."""
    found = error.problems if isinstance(error, Problems) else [error]
    return [one for one in found if isinstance(one, PatientError)]
