"""The table of mutants follows the code; whether tests catch them is asked by `python -m tests.mutants`."""

import ast

import pytest

from tests.mutants import ROOT, with_fault
from tests.support.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_still_is_python(mutant: Mutant):
    text = (ROOT / "afcache" / mutant.file).read_text()
    faulty = with_fault(mutant, text)
    assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))
    assert (ROOT / "tests" / mutant.tests).is_file()


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize(("text", "found"), [("a - b", 0), ("a + b, a + b", 2)])
def test_a_text_that_is_not_there_once_is_named(text: str, found: int):
    mutant = Mutant("sign", "file.py", "a + b", "a - b", "test_file.py")
    with pytest.raises(ValueError, match=rf"sign: afcache/file\.py must hold 'a \+ b' once, found {found} times"):
        with_fault(mutant, text)
