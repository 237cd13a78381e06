/* The end of a context and of a client: every part of the server removes its state. */
#include "server/state.h"

bool teardown_context(struct client *client, const struct sim_request *request)
{
    if (!ledger_has_context(client, request)) return false;
    shares_leave_context(client, request->context);
    turns_leave(client, request->context);
    ledger_close(client, request->context);
    return true;
}

/* Only this function releases the memory of an exited process. */
void teardown_client(struct client *client)
{
    shares_leave(client);
    managed_leave(client);
    ledger_forget(client);
}
