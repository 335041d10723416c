"""The one error a user can cause: a single sentence that says what is wrong, where, and what to type."""


class UserError(ValueError):
    """Bad input; the launchers print the sentence once and every rank exits with code 2."""
