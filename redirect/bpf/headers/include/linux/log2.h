/* Included by bcc, which needs nothing of it for these programs. */
