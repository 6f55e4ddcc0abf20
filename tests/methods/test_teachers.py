from __future__ import annotations

import pytest
import torch
from torch import nn

from largescale.methods.method import Average
from largescale.methods.teachers import cosine_momentum, following, teacher_of


def test_a_teacher_is_a_copy_without_gradient():
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = teacher_of(backbone=student)
    for own, other in zip(teacher["backbone"].parameters(), student.parameters(), strict=True):
        assert torch.equal(own, other) and own is not other and not own.requires_grad and other.requires_grad
    assert following("teacher", "backbone", buffers=True) == [Average("backbone", "teacher.backbone", buffers=True)]


def test_momentum_rises_to_one_along_a_cosine():
    assert [cosine_momentum(0.9, step, 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])
