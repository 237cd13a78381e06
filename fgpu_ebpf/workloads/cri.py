"""A client of the container runtime interface (gRPC): containerd, CRI-O and other engines that kubelet uses.

The module runs in an engine thread of the agent, and imports grpc at the first request only, because grpc is large and
most hosts have no engine with this interface.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from fgpu_ebpf import protobuf
from fgpu_ebpf.workloads import cri_messages
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.engine_answers import POD_UID, AnswerError, EngineError, Labels, labels_of, text_of, with_image
from fgpu_ebpf.workloads.workload import ASKING, Names, Subject

DEADLINE_SECONDS = 2.0
MOST_BYTES = 4 << 20
MOST_IMAGES = 256
READY = 0
_SERVED = (Engine.CONTAINERD, Engine.CRIO, Engine.CRI)
_OPTIONS = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_metadata_size", 65536),
    ("grpc.default_authority", "localhost"),  # CRI-O refuses a path as authority
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # prevents that new connections inherit the last failure's back-off
)


class CriApi:
    """A client of the engine at one socket."""

    name = "cri"
    can_rename = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._channel: Any = None
        self._messages: dict[str, Any] = {}
        self._images: OrderedDict[str, Labels] = OrderedDict()

    def serves(self, subject: Subject) -> bool:
        """Return whether an engine with this interface can have this container or pod."""
        return subject.is_pod or subject.engine in _SERVED

    def close(self) -> None:
        """Close the connection. The threads of an open connection use a thousandth of a processor without a request."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def ask(self, subject: Subject) -> Names | None:
        """Return the names of a container or pod, or None if the engine does not have the subject.

        The method makes at most three calls, each of at most DEADLINE_SECONDS.

        Raises:
            EngineError: the request failed.
            AnswerError: an answer is not of the expected form.
        """
        if subject.is_pod:
            pod = self._pod(subject.id)
            return None if pod is None else _names(pod)
        answer = self._call("ContainerStatus", "Runtime", container_id=subject.id)
        if answer is None:
            return self._of_sandbox(subject.id)
        status = answer.status
        if not status.id.startswith(subject.id):
            raise AnswerError("is about another container")
        pod = self._pod(status.labels.get(POD_UID, ""))
        if pod is None:
            return None
        return with_image(_names(pod, status), self._image(status.image_ref or status.image.image))

    def _of_sandbox(self, id_: str) -> Names | None:
        """Return empty names if the id belongs to a pod's sandbox, else None.

        A sandbox has the namespaces of the pod and no program of the user, so policies need not match a sandbox by
        label.
        """
        found = self._call("ListPodSandbox", "Runtime", filter=self._known_messages()["PodSandboxFilter"](id=id_))
        return Names() if found and found.items else None

    def _pod(self, uid: str) -> Any:
        """Return a ready sandbox of the pod, else the latest sandbox, or None if the pod has no sandbox yet."""
        messages = self._known_messages()
        wanted = messages["PodSandboxFilter"](label_selector={POD_UID: uid})
        answer = self._call("ListPodSandbox", "Runtime", filter=wanted)
        pods = [pod for pod in answer.items if pod.metadata.uid == uid] if answer else []
        return max(pods, key=lambda pod: (pod.state == READY, pod.created_at), default=None)

    # -- images

    def _image(self, ref: str) -> Labels | None:
        """Return the labels of an image, or None if the engine does not report these labels."""
        if ref in self._images:
            self._images.move_to_end(ref)
            return self._images[ref]
        wanted = self._known_messages()["ImageSpec"](image=ref)
        answer = self._call("ImageStatus", "Image", image=wanted, verbose=True) if ref else None
        labels = _image_labels(answer.info.get("info", "")) if answer else None
        if labels is not None:
            self._images[ref] = labels
            if len(self._images) > MOST_IMAGES:
                self._images.popitem(last=False)
        return labels

    # -- calls

    def _known_messages(self) -> dict[str, Any]:
        if not self._messages:
            self._messages = cri_messages.classes()
        return self._messages

    def _call(self, method: str, service: str, **fields: Any) -> Any:
        """Call a method of the interface and return its response.

        Returns:
            The response message, or None if the status is NOT_FOUND.

        Raises:
            EngineError: the call failed, or a Python package is missing.
            AnswerError: the response is too long or not of the expected form.
        """
        try:
            import grpc

            messages = self._known_messages()
        except ImportError as error:
            raise EngineError(protobuf.lacks(error)) from error
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.path}", options=_OPTIONS)
        call = self._channel.unary_unary(f"/{cri_messages.PACKAGE}.{service}Service/{method}")  # bytes, not messages
        try:
            answer = call(messages[f"{method}Request"](**fields).SerializeToString(), timeout=DEADLINE_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise AnswerError(f"is longer than {MOST_BYTES >> 20} MiB") from error
            self.close()
            raise EngineError(_reason(method, error, grpc)) from error
        try:
            return messages[f"{method}Response"].FromString(answer)
        except Exception as error:  # not only DecodeError, whose module depends on the version of protobuf
            raise AnswerError(f"is not a {method}Response") from error


def _names(pod: Any, status: Any = None) -> Names:
    """Return the names of a pod, or of a container in the pod if `status` is given.

    If a key occurs several times, labels have precedence over annotations, and the pod has precedence over the
    container. Requests in annotations of the container have precedence over all other requests, because the pod cannot
    write these annotations. kubelet copies the allocation of its device plugin into these annotations.
    """
    labels, notes = [dict(pod.labels)], [dict(pod.annotations)]
    name = image = None
    if status is not None:
        labels.insert(0, {key: status.annotations[key] for key in ASKING if key in status.annotations})
        labels, notes = [*labels, dict(status.labels)], [*notes, dict(status.annotations)]
        name = text_of(status.metadata.name)
        image = text_of(status.image.user_specified_image or status.image.image)
    meta = pod.metadata
    found, is_cut = labels_of(*labels, *notes)
    return Names(name or "", text_of(meta.name), text_of(meta.namespace), image, found, is_cut=is_cut)


def _reason(method: str, error: Any, grpc: Any) -> str:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "the engine does not support CRI v1: containerd 1.6, CRI-O 1.20 or later is needed"
    return f"{method}: {error.code().name.lower()}: {str(error.details())[:200]}"


def _image_labels(info: str) -> Labels | None:
    """Return the labels in an image's configuration, or None if the configuration cannot be read.

    `info`: JSON that containerd and CRI-O return in addition to the interface's fields.
    """
    try:
        config = json.loads(info)["imageSpec"]["config"]
        return labels_of(config.get("Labels"))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
