"""The table of parts that fill it themselves: look-up, errors, order, and the import of a package's modules."""

import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.settings.registry import Registry


def test_a_registered_part_is_found_by_its_name_in_order_of_registration() -> None:
    shapes: Registry[int] = Registry("shape")
    assert shapes.register("square")(4) == 4
    shapes.register("circle")(0)

    assert shapes["square"] == 4 and shapes.names == ("square", "circle") == tuple(shapes)
    assert "circle" in shapes and "triangle" not in shapes and len(shapes) == 2 and shapes.get("triangle") is None


def test_a_decorated_class_stays_what_it_is() -> None:
    kinds: Registry[type] = Registry("kind")

    @kinds.register("mine")
    class Mine:
        pass

    assert kinds["mine"] is Mine


def test_an_unknown_name_is_a_user_error_that_names_the_nearest() -> None:
    estimators: Registry[int] = Registry("score_estimator", noun="estimator")
    estimators.register("x0_renoise")(1)
    with pytest.raises(UserError, match=r"^there is no estimator 'x0_renois'; score_estimator is one of x0_renoise \(did you mean"):
        estimators["x0_renois"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A package of two parts and a module that must not be imported, and the table that stands outside it."""
    folder = tmp_path / "registered_parts"
    folder.mkdir()
    (folder / "__init__.py").write_text("from library.settings.registry import Registry\nPARTS = Registry('part', 'registered_parts')\n")
    for module, name in (("beta", "b"), ("alpha", "a")):
        (folder / f"{module}.py").write_text(f"from registered_parts import PARTS\nPARTS.register({name!r})({module!r})\n")
    (folder / "_draft.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.startswith("registered_parts")]:
        monkeypatch.delitem(sys.modules, module)
    import registered_parts  # type: ignore[import-not-found]

    return registered_parts.PARTS


def test_a_packages_modules_are_imported_at_the_first_look_up(package: Registry[str]) -> None:
    assert "registered_parts.alpha" not in sys.modules
    assert package["b"] == "beta"
    assert package.names == ("a", "b")


def test_the_order_is_that_of_the_modules_whichever_was_imported_first(package: Registry[str]) -> None:
    import registered_parts.beta  # type: ignore[import-not-found]  # noqa: F401

    assert package.names == ("a", "b")


def test_where_parts_are_named_after_modules_only_the_wanted_one_is_imported(package: Registry[str]) -> None:
    import registered_parts  # type: ignore[import-not-found]

    folder = Path(registered_parts.__path__[0])
    for module in ("first", "second"):
        (folder / f"{module}.py").write_text(f"from registered_parts import KINDS\nKINDS.register({module!r})('a part')\n")
    for module in ("alpha", "beta"):
        (folder / f"{module}.py").unlink()
    kinds: Registry[str] = Registry("kind", "registered_parts", named_after_modules=True)
    registered_parts.KINDS = kinds

    assert kinds.names == ("first", "second") and "second" in kinds and kinds.get("third") is None
    assert "registered_parts.second" not in sys.modules
    assert kinds["second"] == "a part"
    assert "registered_parts.first" not in sys.modules
    with pytest.raises(UserError, match="there is no kind 'secnd'; kind is one of first, second"):
        kinds["secnd"]
