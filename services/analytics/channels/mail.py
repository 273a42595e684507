"""E-mail over SMTP, through the one server of the settings."""

import re
from email.message import EmailMessage
from email.utils import formatdate

import aiosmtplib

from services.analytics.alerting import Outcome
from services.analytics.channels import BadConfigError, Config, Described, Message

ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9.-]{1,189}")
AUTHENTICATION = range(530, 540)  # of ours with the server, and not of the message's


class Mail:
    """Messages in plain text. The Message-ID is made of the idempotency key, so that a repeat can be told."""

    def __init__(
        self, *, host: str, port: int, user: str, password: str, sender: str, starttls: bool, seconds_max: float
    ) -> None:
        self._host = host
        self._port = port
        self._user = user
        self._password = password
        self._sender = sender
        self._starttls = starttls
        self._seconds_max = seconds_max

    def describe(self, config: Config) -> Described:
        if not self._host:
            raise BadConfigError("to", "cannot be used: the service is set to no SMTP server")
        if not ADDRESS.fullmatch(config["to"]):
            raise BadConfigError("to", "must be an address such as shop@example.com")
        return Described(config["to"], f"mailto:{config['to']}")

    async def send(self, config: Config, message: Message) -> Outcome:
        if not self._host:
            return Outcome("NO_SMTP_SERVER", permanent=True)
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = self._sender, config["to"], message.subject
        mail["Date"] = formatdate()
        mail["Message-ID"] = f"<{message.key}@{self._sender.rpartition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(message.body)
        try:
            await aiosmtplib.send(
                mail, hostname=self._host, port=self._port, start_tls=self._starttls,
                username=self._user or None, password=self._password or None, timeout=self._seconds_max,
            )  # fmt: skip
        except aiosmtplib.SMTPRecipientsRefused as error:
            return _refused(max(one.code for one in error.recipients))
        except aiosmtplib.SMTPResponseException as error:
            return _refused(error.code)
        except aiosmtplib.SMTPException as error:
            return Outcome(type(error).__name__)
        return Outcome(status=250)

    async def close(self) -> None:
        """There is a connection for each message."""


def _refused(code: int) -> Outcome:
    return Outcome(f"SMTP_{code}", code, permanent=code // 100 == 5 and code not in AUTHENTICATION)
