"""Whether PEM files are what TLS needs. gRPC only says that it cannot, or ends the process; this says why.

Knows neither server nor client.
"""

import os
import ssl

PemFile = str | os.PathLike[str]


def check_identity(cert_file: PemFile, key_file: PemFile) -> None:
    """Raises ValueError unless they are a certificate and its unencrypted key; OSError where one cannot be read."""
    try:
        # An empty password: a key that needs one is an error, never a prompt on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except ssl.SSLError as error:
        raise ValueError(
            f"{cert_file} and {key_file} are no PEM certificate with its unencrypted key ({error.reason})"
        ) from error


def check_authority(ca_file: PemFile) -> None:
    """Raises ValueError unless it holds a certificate; OSError where it cannot be read."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"{ca_file} has no PEM certificate ({error.reason})") from error
