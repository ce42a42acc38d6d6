"""The demo's one error."""


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for its user."""
