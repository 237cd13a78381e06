"""Print every program that is executed in one cgroup, as the kernel reports it.

It is run by the interpreter that can import BCC: exec_kit.py CGROUP_ID STUBS. It prints a line with the new program's
name as soon as the program is executed, and exits when its stdin is closed.
"""

import os
import sys
import threading

os.environ["BCC_KERNEL_SOURCE"] = sys.argv[2]
from bcc import BPF

SOURCE = """
struct began { char name[16]; };
BPF_PERF_OUTPUT(news);
int began(struct bpf_raw_tracepoint_args *ctx) {
    if (bpf_get_current_cgroup_id() != CGROUPULL) return 0;
    struct began one = {};
    bpf_get_current_comm(&one.name, sizeof one.name);
    news.perf_submit(ctx, &one, sizeof one);
    return 0;
}
"""


def main() -> None:
    bpf = BPF(text=SOURCE.replace("CGROUP", sys.argv[1]))
    bpf.attach_raw_tracepoint("sched_process_exec", "began")
    bpf["news"].open_perf_buffer(lambda _, data, __: print(bpf["news"].event(data).name.decode(), flush=True))
    print("ready", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        bpf.perf_buffer_poll(100)


main()
