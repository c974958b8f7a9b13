"""Turns with shared devices where the real runs do not lead: none are shared, no server is up, a turn is repeated."""

from __future__ import annotations

from vespo_megatron.trainer.device_turns import DeviceTurns, Phase


class Node:
    """A policy's memory and a controller in one, which write down what is asked of them."""

    def __init__(self, up):
        self.up, self.said = up, []

    def park(self, *parts):
        self.said.append(f"park {' '.join(parts)}")

    def restore(self, *parts):
        self.said.append(f"restore {' '.join(parts) or 'all'}")

    def release_memory(self):
        self.said.append("release")
        return self.up

    def resume_memory(self):
        self.said.append("resume")

    def await_server(self):
        self.said.append("await")

    def take(self, *, shared=True):
        def call(action):
            return getattr(self, action.__name__)() if action.__name__ in vars(Node) else action(self)

        return DeviceTurns(self, call, lambda: self.said.append("meet"), shared=shared)


def test_what_is_not_shared_is_left_alone():
    node = Node(up=1)
    turns = node.take(shared=False)
    for turn in (turns.to_weights, turns.to_servers, turns.to_trainer):
        turn()
    assert node.said == [] and turns.servers_can_generate


def test_a_turn_that_is_taken_is_not_taken_again_but_weights_may_be_asked_for_in_any():
    node = Node(up=1)
    turns = node.take()
    turns.to_trainer()
    assert node.said == [] and turns.phase is Phase.TRAIN and not turns.servers_can_generate
    turns.to_weights()
    turns.to_servers()
    assert turns.servers_can_generate
    assert node.said == [
        "park gradients optimizer",
        "release",
        "restore parameters",
        "park parameters",
        "meet",
        "resume",
    ]
    node.said.clear()
    turns.to_weights()  # a server came back in the middle of a rollout, with a share of its own
    assert node.said == ["park gradients optimizer", "release", "restore parameters"]


def test_where_no_server_is_up_the_trainer_leaves_until_one_is():
    node = Node(up=0)
    node.take().to_weights()
    assert node.said == [
        "park gradients optimizer",
        "release",
        "park parameters",
        "meet",
        "await",
        "restore parameters",
    ]
