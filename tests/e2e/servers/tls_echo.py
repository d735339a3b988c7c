"""An application with TLS of its own: echoes what it decrypts.

Usage: ``tls_echo.py PORT CERTIFICATE_AND_KEY``.
"""

import socket
import ssl
import sys
import threading


def serve(context, sock):
    try:
        with context.wrap_socket(sock, server_side=True) as tls:
            while data := tls.recv(65536):
                tls.sendall(data)
    except OSError:
        sock.close()


if __name__ == "__main__":
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(sys.argv[2])
    server = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        threading.Thread(target=serve, args=(own, server.accept()[0]), daemon=True).start()
