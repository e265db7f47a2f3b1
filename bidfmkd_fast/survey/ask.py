"""Ask one API about the shared pictures that it has not answered yet."""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.runtime.interrupt import Stop, check, current
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.cost import piece_size
from bidfmkd_fast.survey.pictures import SharedPictures


def ask(api: BlackBox, pictures: SharedPictures, answers: Answers) -> None:
    """Ask `api` about every picture that `answers` lacks, and keep each answer as it comes.

    A call is one request. A service has as many under way at once as it allows.

    Raises:
        BudgetExhausted, BadAnswer, APIUnavailable: as the API's call; what was answered is kept.
    """

    def ask_piece(first: int, n: int) -> None:
        check()
        answers.add(first, api(pictures.for_api(first, n, api.spec)))

    pieces = answers.missing(piece_size(api))
    if not isinstance(api, ServiceBlackBox):
        for first, n in pieces:
            ask_piece(first, n)
        return
    stop = Stop(current())
    with ThreadPoolExecutor(api.in_flight, "survey", initializer=stop.adopt) as pool:
        calls: list[Future[None]] = []
        try:
            calls += [pool.submit(ask_piece, *piece) for piece in pieces]
            finished, _ = wait(calls, return_when=FIRST_EXCEPTION)
            if any(call.exception() for call in finished):
                pool.shutdown(wait=False, cancel_futures=True)
        except BaseException:  # Ctrl-C; leaving the block waits for the calls, so they must end
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for call in calls:
        if not call.cancelled() and (error := call.exception()) is not None:
            raise error
