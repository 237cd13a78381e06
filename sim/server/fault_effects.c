/* The effects of a fault on clients when it is set. */
#include "server/state.h"

void fault_set(uint32_t fault, uint32_t device, uint64_t number)
{
    fault_record(fault, device, number);
    switch (fault) {
    case SIM_FAULT_DEVICE_LOST:
    case SIM_FAULT_DEVICE_RESET:
        clients_lose_devices();
        break;
    case SIM_FAULT_ONE_LOST:
        clients_lose_device(device);
        break;
    case SIM_FAULT_ECC:
        clients_meet_ecc();
        break;
    case SIM_FAULT_NVML_GONE:
        clients_lose_nvml();
        break;
    case SIM_FAULT_NVML_CUT:
        clients_cut_nvml();
        break;
    }
}

int fault_start(const char *spec)
{
    struct fault_order orders[MAX_FAULTS];
    unsigned n = spec ? fault_parse(spec, orders) : 0;
    if (spec && !n) return -1;
    for (unsigned i = 0; i < n; i++) fault_set(orders[i].fault, orders[i].device, orders[i].number);
    return 0;
}
