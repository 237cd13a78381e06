"""What engines answer about a container -> Names, however odd the answer is.

Owns: which labels of a workload count, and how many. Never: trusts the form of an answer, or lets one be long. On
failure: AnswerError where an answer is none at all; a label that is too long or not printable is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from fgpu_ebpf.identity import ASKING, Names

MOST_LABELS = 256
MOST_KEY_CHARACTERS = 317  # a Kubernetes name with its prefix
MOST_VALUE_CHARACTERS = 256
MOST_CHARACTERS = 16384  # of all labels of one workload
MOST_NAME_CHARACTERS = 512
POD_NAME, POD_NAMESPACE, POD_UID = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace", "io.kubernetes.pod.uid"


class EngineError(Exception):
    """The engine cannot be asked now; the text says why."""


class AnswerError(Exception):
    """The engine answers, and not what it should; the text says what."""


def labels_of(*sources: object) -> dict[str, str]:
    """Labels and annotations in one, the first source that has one wins. What a workload may ask for is never cut."""
    found: dict[str, str] = {}
    left = MOST_CHARACTERS
    for key, value in _in_order(sources):
        size = len(key) + len(value)
        if key in found or size > left or len(found) >= MOST_LABELS:
            continue
        found[key] = value
        left -= size
    return found


def _in_order(sources: tuple[object, ...]) -> Iterator[tuple[str, str]]:
    maps: list[Mapping[Any, Any]] = [source for source in sources if isinstance(source, Mapping)]
    first = ((key, source[key]) for source in maps for key in ASKING if key in source)
    for key, value in chain(first, (item for source in maps for item in source.items())):
        if _is_label(key, value):
            yield key, value


def _is_label(key: object, value: object) -> bool:
    return (
        isinstance(key, str) and 0 < len(key) <= MOST_KEY_CHARACTERS and key.isprintable()
        and isinstance(value, str) and len(value) <= MOST_VALUE_CHARACTERS and value.isprintable()
    )  # fmt: skip


def text_of(value: object) -> str | None:
    """A name in an answer; None: it is none that anybody could match or read."""
    if isinstance(value, str) and 0 < len(value) <= MOST_NAME_CHARACTERS and value.isprintable():
        return value
    return None


def asks_anything(labels: Mapping[str, str]) -> bool:
    """It carries something that its image may have brought along."""
    return any(key in labels for key in ASKING)


def with_image(names: Names, image: object) -> Names:
    """Names whose labels have the image's in them: what the image asks for is told from what the workload does.

    `image`: its labels; no mapping: nobody knows them, and the image may have asked for all of it.
    """
    known = isinstance(image, Mapping)
    own = labels_of(image) if known else names.labels
    asks = {key: own[key] for key in ASKING if key in own and names.labels.get(key, own[key]) == own[key]}
    labels = {**{k: v for k, v in own.items() if k not in ASKING}, **names.labels} if known else dict(names.labels)
    labels = {key: value for key, value in labels.items() if key not in asks}
    return Names(names.name, names.pod, names.namespace, names.image, labels, asks)


# -- Docker, Podman ------------------------------------------------------------------------------------------------


def of_docker(found: object, id_: str) -> tuple[Names, str] | None:
    """The answer to /containers/json for one id, and the id of the image; None: no such container. AnswerError."""
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise AnswerError("is no list of containers")
    fits = [item for item in found if str(item.get("Id", "")).startswith(id_)]
    if len(fits) != 1:
        return None
    item = fits[0]
    host = item.get("HostConfig")
    annotations = host.get("Annotations") if isinstance(host, dict) else None
    labels = labels_of(item.get("Labels"), item.get("Annotations"), annotations)
    called = item.get("Names")
    own = (
        [text for text in called if isinstance(text, str) and text.rfind("/") == 0] if isinstance(called, list) else []
    )
    name = text_of(own[0]) if own else None  # the others, /A/B, are what A calls it
    pod, namespace = labels.get(POD_NAME), labels.get(POD_NAMESPACE)
    names = Names((name or "").lstrip("/"), pod, namespace, text_of(item.get("Image")), labels)
    return names, text_of(item.get("ImageID")) or ""


def docker_image_labels(found: object) -> Mapping[str, str] | None:
    """The answer to /images/ID/json -> the image's labels; None: it does not say. AnswerError."""
    if not isinstance(found, dict) or not isinstance(found.get("Config") or {}, dict):
        raise AnswerError("is no image")
    return labels_of((found.get("Config") or {}).get("Labels"))
