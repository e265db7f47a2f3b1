"""Ask one API about the shared pictures that it has not answered yet."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.runtime.interrupt import Stop, check, current
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.cost import piece_size
from bidfmkd_fast.survey.pictures import SharedPictures


def ask(api: BlackBox, pictures: SharedPictures, answers: Answers, numbers: range) -> None:
    """Ask `api` about the pictures `numbers` that `answers` lacks; keep each answer as it comes.

    A call is one request. A service has as many under way at once as it allows.

    Raises:
        BudgetExhausted, BadAnswer, APIUnavailable: as the API's call; what was answered is kept.
    """

    failed = threading.Event()

    def ask_piece(first: int, n: int) -> None:
        check()
        if failed.is_set():  # a service that failed is left alone at once
            return
        end = first + n
        try:
            while first < end:  # the limit of a service may fall while it is asked
                size = min(end - first, piece_size(api))
                answers.add(first, api(pictures.for_api(first, size, api.spec)))
                first += size
        except BaseException:
            failed.set()
            raise

    if isinstance(api, ServiceBlackBox) and answers.missing(len(answers.answered), numbers):
        api.requests_for(1)  # may ask the service for its batch limit, so that calls are requests
    pieces = answers.missing(piece_size(api), numbers)
    if not isinstance(api, ServiceBlackBox):
        for first, n in pieces:
            ask_piece(first, n)
        return
    stop = Stop(current())
    with ThreadPoolExecutor(api.in_flight, "survey", initializer=stop.adopt) as pool:
        calls: list[Future[None]] = []
        try:
            calls += [pool.submit(ask_piece, *piece) for piece in pieces]
            wait(calls)
        except BaseException:  # Ctrl-C; leaving the block waits for the calls, so they must end
            stop.set()
            failed.set()
            raise
    for call in calls:
        call.result()
