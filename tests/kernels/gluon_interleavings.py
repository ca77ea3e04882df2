"""Every order in which the agents of a program can take their steps, and the copies they start can land.

The steps are the traces that `gluon_on_cpu` kept: what an agent does depends on the call and not on the order. A state is how far
each agent has come, the barriers, the copies that run, and what the places hold. A product reads its places from its start until it
is retired, a copy writes its place from its start until it lands: overlaps are races, whenever the reading and writing really happen.
A state with steps left and none possible is a deadlock. A product must read the same copy in every order, and every copy
must be read by every agent that multiplies.
"""

from collections import Counter
from typing import NamedTuple


class Race(AssertionError):
    """Two agents meet at a place."""


class Deadlock(AssertionError):
    """All agents wait for something that never comes."""


class State(NamedTuple):
    """at: steps taken by agent; barriers: (phases ended, arrivals pending, bytes pending) each; running: (agent, step) of copies; places:
    (agent, step) of the copy or store that each holds."""

    at: tuple
    barriers: tuple
    running: frozenset
    places: tuple


def search(traces, counts, limit=2_000_000):
    """-> number of states of the agents' traces (lists of Events, of one program). counts: {barrier: arrivals of a phase}."""
    agents = tuple(sorted(traces))
    met = _meeting_places(traces)
    steps = [[event for event in traces[agent] if not _is_private(event, met)] for agent in agents]
    barriers = {barrier: number for number, barrier in enumerate(sorted(counts))}
    writing = ("copy", "store")
    places = sorted({place for trace in steps for event in trace if event.kind in writing for place in event.places})
    reading = [list(_readings(trace, set(places))) for trace in steps]
    start = State(
        (0,) * len(agents), tuple((0, counts[name], 0) for name in barriers), frozenset(), (None,) * len(places)
    )
    seen, waiting, read = {start}, [start], {}
    while waiting:
        state = waiting.pop()
        nexts = [_land(state, copy, steps, barriers, places, counts) for copy in state.running]
        for agent, trace in enumerate(steps):
            if state.at[agent] < len(trace):
                after = _step(state, agent, steps, barriers, counts, places, reading, read)
                nexts += [] if after is None else [after]
        if not nexts and any(at < len(trace) for at, trace in zip(state.at, steps, strict=True)):
            stuck = [f"{agents[a]} at {steps[a][at]}" for a, at in enumerate(state.at) if at < len(steps[a])]
            raise Deadlock("; ".join(stuck))
        for after in nexts:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
        if len(seen) > limit:
            raise RuntimeError(f"more than {limit} states")
    copies = {
        (agent, at) for agent, trace in enumerate(steps) for at, event in enumerate(trace) if event.kind == "copy"
    }
    for agent in {agent for agent, _, _ in read}:
        if unread := copies - {copy for (reader, _, _), copy in read.items() if reader == agent}:
            raise Race(f"{agents[agent]} never reads {len(unread)} of {len(copies)} tiles")
    return len(seen)


def _meeting_places(traces):
    """Places that one agent stores to and another reads or stores to."""
    users = {}
    for agent, trace in traces.items():
        for event in trace:
            for place in event.places:
                users.setdefault(place, set()).add(agent)
    stored = {event.places[0] for trace in traces.values() for event in trace if event.kind == "store"}
    return {place for place in stored if len(users[place]) > 1}


def _is_private(event, met):
    if event.kind in ("store", "load"):
        return event.places[0] not in met
    return event.kind == "product" and not event.places


def _readings(trace, shared):
    """For each step, the shared places that products before it read and that are not retired yet."""
    running = []
    for event in trace:
        yield Counter(place for places in running for place in places)
        if event.kind == "product":
            running.append([place for place in event.places if place in shared])
        elif event.kind == "retire":
            running = running[len(running) - event.number :]
    yield Counter(place for places in running for place in places)


def _settled(barrier, count):
    ended, pending, size = barrier
    if pending < 0:
        raise Race("more arrivals than a barrier takes")
    return (ended + 1, count, 0) if pending == 0 and size == 0 else barrier


def _changed(state, name, barriers, counts, arrivals, size):
    number = barriers[name]
    ended, pending, bytes_left = state.barriers[number]
    after = _settled((ended, pending - arrivals, bytes_left + size), counts[name])
    return (*state.barriers[:number], after, *state.barriers[number + 1 :])


def _land(state, copy, steps, barriers, places, counts):
    event = steps[copy[0]][copy[1]]
    place = places.index(event.places[0])
    held = (*state.places[:place], copy, *state.places[place + 1 :])
    changed = _changed(state, event.barrier, barriers, counts, 0, -event.number)
    return State(state.at, changed, state.running - {copy}, held)


def _step(state, agent, steps, barriers, counts, places, reading, read):
    """The state after an agent's next step, None while it waits."""
    at = state.at[agent]
    event = steps[agent][at]
    moved = (*state.at[:agent], at + 1, *state.at[agent + 1 :])
    written = {steps[a][step].places[0] for a, step in state.running}
    if event.kind == "wait":
        return state._replace(at=moved) if state.barriers[barriers[event.barrier]][0] % 2 != event.number else None
    if event.kind == "arrive":
        return state._replace(at=moved, barriers=_changed(state, event.barrier, barriers, counts, event.number, 0))
    if event.kind == "expect":
        return state._replace(at=moved, barriers=_changed(state, event.barrier, barriers, counts, 1, event.number))
    if event.kind in ("copy", "store"):
        place = event.places[0]
        if place in written or any(trace[state.at[a]][place] for a, trace in enumerate(reading)):
            raise Race(f"{place} is overwritten while it is read or written")
        if event.kind == "store":
            number = places.index(place)
            return state._replace(at=moved, places=(*state.places[:number], (agent, at), *state.places[number + 1 :]))
        return state._replace(at=moved, running=state.running | {(agent, at)})
    if event.kind in ("product", "load"):
        for place in event.places:
            if place in places:
                if place in written:
                    raise Race(f"{place} is read while a copy to it runs")
                held = state.places[places.index(place)]
                if read.setdefault((agent, at, place), held) != held or held is None:
                    raise Race(f"{place} holds one tile or another")
    return state._replace(at=moved)
