# docker build -t depthprobe . && docker run --rm -v "$PWD/runs:/study/runs" depthprobe
FROM python:3.13-slim
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY depthprobe depthprobe
# the CPU wheels of torch; PyPI's bring gigabytes of CUDA
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .
WORKDIR /study
ENTRYPOINT ["depthprobe"]
CMD ["sweep"]
