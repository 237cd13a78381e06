/* The gate at which calls stop while another process has locked this one, and the restore thread. */
#ifndef FGPU_SIM_CUDA_CORE_GATE_H
#define FGPU_SIM_CUDA_CORE_GATE_H

#include <stdbool.h>
#include <stdint.h>

/* Opens the driver's node. Returns false if it does not exist. */
bool node_open(void);
/* Maps the gate that the server has sent, and starts the restore thread. Closes `file`. Without a gate, or without a
 * thread, other processes cannot lock this one. */
void gate_begin(int file);
/* Waits while the gate is closed, and counts the calling thread as inside until it calls gate_leave. */
void gate_enter(void);
/* Ends the process by SIGSEGV while it is checkpointed, as the real driver does in waits and queries: these read a word
 * that the device writes, which is not mapped then. */
void gate_read_completion(void);
/* Returns whether the process is checkpointed. */
bool gate_is_parked(void);
/* Returns the device that this process uses as `device`: another one after a restore elsewhere. */
uint32_t gate_device(uint32_t device);
/* Does nothing in a thread that is not inside. */
void gate_leave(void);

#endif
