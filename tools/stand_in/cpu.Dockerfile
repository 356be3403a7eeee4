# A stand-in for rocm/pytorch on machines that cannot pull it: Debian, a Python venv at /opt/venv, torch in it.
ARG ROOTFS
FROM ${ROOTFS}
ARG TORCH
SHELL ["/bin/sh", "-eu", "-c"]

RUN python3 -m venv /opt/venv
RUN --mount=type=cache,target=/var/cache/radeon-stack/pip \
    --mount=type=secret,id=ca \
    --mount=type=secret,id=pip \
    --mount=type=bind,source=wheels,target=/wheels \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi; \
    /opt/venv/bin/pip install --cache-dir /var/cache/radeon-stack/pip --disable-pip-version-check --no-input \
      --find-links /wheels "torch==${TORCH}"

ENV PATH=/opt/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv
