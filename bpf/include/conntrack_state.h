/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What conntrack says of a packet; trace events carry the number. */
#pragma once

enum ct_state {
	CT_NEW = 0,	    /* no connection: policy decides, an entry is made */
	CT_ESTABLISHED = 1, /* goes the way the connection was opened: policy still decides */
	CT_REPLY = 2,	    /* goes the other way: allowed because the connection is */
	CT_RELATED = 3,	    /* an ICMP error about a packet of a connection: allowed likewise */
};
