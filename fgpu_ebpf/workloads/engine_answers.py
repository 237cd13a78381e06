"""The conversion of the engines' answers about containers to Names. The answers are not trusted.

The module runs in the engine threads of the agent. The size of the result is bounded. An answer of the wrong form
raises AnswerError. A label that is too long or not printable is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from fgpu_ebpf.workloads.workload import ASKING, Names

MOST_LABELS = 256
MOST_KEY_CHARACTERS = 317  # a Kubernetes name with its prefix
MOST_VALUE_CHARACTERS = 256
MOST_ASKING_CHARACTERS = 4096  # a scheduler's annotation names every device of every container of a pod
MOST_CHARACTERS = 16384  # keys and values of all labels of one workload
MOST_NAME_CHARACTERS = 512
POD_NAME, POD_NAMESPACE, POD_UID = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace", "io.kubernetes.pod.uid"
_FIRST = (POD_NAME, POD_NAMESPACE, POD_UID, *ASKING)


class EngineError(Exception):
    """The error of a failed request to an engine. The text has the reason."""


class AnswerError(Exception):
    """The error of an answer that is not of the expected form.

    The text completes a sentence that begins with "the engine's answer".
    """


class Labels(NamedTuple):
    """MOST_LABELS labels with MOST_CHARACTERS characters, or fewer. `is_cut`: whether further labels were left out."""

    of: Mapping[str, str]
    is_cut: bool


def labels_of(*sources: object) -> Labels:
    """Merge labels and annotations. If several sources have a key, the first source has precedence.

    The keys in _FIRST are added first.
    """
    found: dict[str, str] = {}
    left, is_cut = MOST_CHARACTERS, False
    for key, value in _in_order(sources):
        size = len(key) + len(value)
        if key in found:
            continue
        if size > left or len(found) >= MOST_LABELS:
            is_cut = True
            continue
        found[key] = value
        left -= size
    return Labels(found, is_cut)


def _in_order(sources: tuple[object, ...]) -> Iterator[tuple[str, str]]:
    maps: list[Mapping[Any, Any]] = [source for source in sources if isinstance(source, Mapping)]
    first = ((key, source[key]) for source in maps for key in _FIRST if key in source)
    for key, value in chain(first, (item for source in maps for item in source.items())):
        if _is_label(key, value):
            yield key, value


def _is_label(key: object, value: object) -> bool:
    most = MOST_ASKING_CHARACTERS if key in ASKING else MOST_VALUE_CHARACTERS
    return (
        isinstance(key, str) and 0 < len(key) <= MOST_KEY_CHARACTERS and key.isprintable()
        and isinstance(value, str) and len(value) <= most and value.isprintable()
    )  # fmt: skip


def text_of(value: object) -> str | None:
    """Return a name from an answer, or None if the value is not text, is empty or too long, or is not printable."""
    if isinstance(value, str) and 0 < len(value) <= MOST_NAME_CHARACTERS and value.isprintable():
        return value
    return None


def asks_anything(labels: Mapping[str, str]) -> bool:
    """Return whether the labels contain a request for limits. The request may come from the image."""
    return any(key in labels for key in ASKING)


def with_image(names: Names, image: Labels | None) -> Names:
    """Merge the image's labels into the names, and move requests of the image to `image_asks`.

    Args:
        names: the names and labels of the container.
        image: the labels of the image. If these labels are unknown, all requests count as requests of the image.
    """
    own = image.of if image else names.labels
    asks = {key: own[key] for key in ASKING if key in own and names.labels.get(key, own[key]) == own[key]}
    is_whole = image is not None and not names.is_cut  # the container may have another value of a label left out
    labels = {**{k: v for k, v in own.items() if k not in ASKING}, **names.labels} if is_whole else dict(names.labels)
    labels = {key: value for key, value in labels.items() if key not in asks}
    is_cut = names.is_cut or (image is not None and image.is_cut)
    return Names(names.name, names.pod, names.namespace, names.image, labels, asks, is_cut)


# -- Docker, Podman ------------------------------------------------------------------------------------------------


def of_docker(found: object, id_: str) -> tuple[Names, str, bool] | None:
    """Parse the answer to /containers/json for one id. Raise AnswerError if the answer is not a list.

    Returns:
        The names, the id of the image, and whether the container runs; or None if there is no such container.
    """
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise AnswerError("is not a list of containers")
    fits = [item for item in found if str(item.get("Id", "")).startswith(id_)]
    if len(fits) != 1:
        return None
    item = fits[0]
    host = item.get("HostConfig")
    annotations = host.get("Annotations") if isinstance(host, dict) else None
    labels, is_cut = labels_of(item.get("Labels"), item.get("Annotations"), annotations)
    called = item.get("Names")
    own = (
        [text for text in called if isinstance(text, str) and text.rfind("/") == 0] if isinstance(called, list) else []
    )
    name = text_of(own[0]) if own else None  # a name /A/B is an alias of this container in container A
    pod, namespace = labels.get(POD_NAME), labels.get(POD_NAMESPACE)
    names = Names((name or "").lstrip("/"), pod, namespace, text_of(item.get("Image")), labels, is_cut=is_cut)
    return names, text_of(item.get("ImageID")) or "", item.get("State") == "running"


def docker_given_image(found: object) -> str | None:
    """Parse the answer to /containers/ID/json and return the image as given at the creation, or None if unknown."""
    config = found.get("Config") if isinstance(found, dict) else None
    return text_of(config.get("Image")) if isinstance(config, dict) else None


def docker_image_labels(found: object) -> Labels:
    """Parse the answer to /images/ID/json and return the image's labels. Raise AnswerError for other answers."""
    if not isinstance(found, dict) or not isinstance(found.get("Config") or {}, dict):
        raise AnswerError("is not an image")
    return labels_of((found.get("Config") or {}).get("Labels"))
