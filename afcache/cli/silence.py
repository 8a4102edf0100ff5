"""Keeping other libraries' start-up words off the screen: they tell a user of this command nothing."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """A command's time: no Python warnings, and nothing that is logged as information.

    xfuser tells about its groups at level DEBUG, whatever the root logger says. What is logged as a warning while images are
    drawn is for the user: that a prompt is cut off, say, or that the correction is off.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Importing diffusers and what it finds: torchao's missing kernels and torch's deprecations are logged as warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
        _hush_libraries()
    finally:
        logging.disable(before)


def _hush_libraries() -> None:
    """Errors alone from transformers and torch; no bars while weights are loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
