"""Tests of patterns: their matches, compared with a slow and simple matcher, and the time of the worst patterns."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.policy.globs import GlobError, name_globs, path_globs


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("system.slice/docker-*.scope", "system.slice/docker-1f.scope", True),
        ("/system.slice/docker-*.scope", "system.slice/docker-1f.scope", True),
        ("system.slice/docker-*.scope/", "system.slice/docker-1f.scope", True),
        ("system.slice/docker-*.scope", "system.slice/docker-1f.scope/inner", False),
        ("system.slice/*", "system.slice/a/b", False),
        ("system.slice/**", "system.slice/a/b", True),
        ("system.slice/**", "system.slice", False),
        ("**", "", True),
        ("**", "a/b", True),
        ("*", "", False),
        ("*", "a", True),
        ("*", "a/b", False),
        ("**/docker-*", "docker-1", True),
        ("**/docker-*", "a/b/docker-1", True),
        ("**/docker-*", "a/docker-1/c", False),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/**/z", "a/bz", False),
        ("**/a/**", "x/a/y", True),
        ("**/a/**", "x/a", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("a.c", "abc", False),
        (r"dev-a\x2db.*", r"dev-a\x2db.service", True),
        ("a/**/b/*/c/**/d", "a/b/b/x/c/y/d", True),
        ("a/**/**/b", "a/b", True),
    ],
)
def test_patterns_match_exactly_the_expected_paths(pattern, path, matches):
    assert path_globs([pattern]).matches(path) is matches


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("registry.example/*", "registry.example/a/b:1", True),
        ("*torch*", "docker.io/pytorch/pytorch:2", True),
        ("dev", "dev", True),
        ("dev", "dev2", False),
        ("team-?", "team-/", True),
        ("*a*b", "xaxxb", True),
        ("*ab*ab", "xab", False),
        ("a**b", "a/x/b", True),
        ("a*", "a\nb", True),
    ],
)
def test_patterns_match_exactly_the_expected_names(pattern, name, matches):
    assert name_globs([pattern]).matches(name) is matches


def test_one_matching_pattern_of_several_is_enough():
    globs = path_globs(["a/*", "b"])
    assert [globs.matches(path) for path in ("a/x", "b", "a", "b/x")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("", "write \\*\\* for everything"),
        ("/", "write \\*\\* for everything"),
        ("a//b", "// is not supported: write /"),
        ("kubepods**", "did you mean kubepods\\*/\\*\\*"),
        ("docker-[ab]", "is not supported"),
        ("{a,b}", "is not supported"),
        ("x" * 513, "at most 512"),
    ],
)
def test_an_invalid_pattern_is_refused(pattern, hint):
    with pytest.raises(GlobError, match=hint):
        path_globs([pattern])


def slowly_name(pattern: str, name: str) -> bool:
    """Match a name with a simple, slow algorithm."""

    @lru_cache(None)
    def way(i: int, j: int) -> bool:
        if i == len(pattern):
            return j == len(name)
        if pattern[i] == "*":
            return way(i + 1, j) or (j < len(name) and way(i, j + 1))
        return j < len(name) and pattern[i] in ("?", name[j]) and way(i + 1, j + 1)

    return way(0, 0)


def slowly(pattern: str, path: str) -> bool:
    """Match a path with a simple, slow algorithm."""
    folders = tuple(pattern.split("/"))
    names = tuple(path.split("/")) if path else ()

    @lru_cache(None)
    def way(i: int, j: int) -> bool:
        if i == len(folders):
            return j == len(names)
        if folders[i] == "**":
            last = i == len(folders) - 1
            if last and i and not all(f == "**" for f in folders):
                return j < len(names)
            return way(i + 1, j) or (j < len(names) and way(i, j + 1))
        return j < len(names) and slowly_name(folders[i], names[j]) and way(i + 1, j + 1)

    return way(0, 0)


folder = st.one_of(st.just("**"), st.text("ab*?", min_size=1, max_size=5).filter(lambda f: "**" not in f))


@given(st.lists(folder, min_size=1, max_size=5), st.lists(st.text("ab", min_size=1, max_size=4), max_size=6))
def test_paths_match_as_with_the_simple_matcher(folders, names):
    pattern, path = "/".join(folders), "/".join(names)
    assert path_globs([pattern]).matches(path) is slowly(pattern, path)


@given(st.text("ab*?", min_size=1, max_size=12), st.text("ab", max_size=12))
def test_names_match_as_with_the_simple_matcher(pattern, name):
    assert name_globs([pattern]).matches(name) is slowly_name(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("*a" * 200 + "*b", "a" * 4000),
        ("?*" * 200 + "b", "a" * 4000),
        ("**/*a/" * 80 + "b", "a/" * 2000 + "c"),
        ("**/*/" * 80 + "b", "a/" * 2000 + "c"),
        ("*/" * 200 + "b", "a/" * 2000 + "c"),
        ("**/" + "*a" * 100 + "/b", ("a" * 254 + "/") * 15 + "c"),
    ],
)
def test_each_of_the_worst_patterns_is_matched_within_one_second(pattern, path):
    globs = path_globs([pattern])
    begun = time.process_time()
    assert not globs.matches(path)
    assert time.process_time() - begun < 1.0  # a matcher that backtracks would take far longer
