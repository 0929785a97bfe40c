"""Source and output in buckets: moto on loopback."""

from pipeline.report import write_report
from tests.pipeline.fake_run import job_of
from tests.pipeline.report.test_report import finished, picture
from tests.pipeline.test_read import tar_of
from tests.pipeline.test_s3 import s3, server  # noqa: F401 (fixtures)


def test_pictures_and_numbers_are_found_in_buckets(s3, server):  # noqa: F811
    for i in range(5):
        s3.put_object(Bucket="data", Key=f"in/{i}.png", Body=picture(i))
    shard = tar_of({f"{i}.png": picture(i) for i in range(4)})
    s3.put_object(Bucket="data", Key="in/z.tar", Body=shard)
    finished(job_of("s3://data/in", "s3://out/set", endpoint_url=server))
    written = write_report("s3://out/set", server)
    assert (written.report.rows, written.report.problems) == (9, ())
    assert written.report.runs[0].seconds == 1800.0
    assert written.html == "s3://out/set/_vl01/report.html"
    page = s3.get_object(Bucket="out", Key="set/_vl01/report.html")["Body"].read().decode()
    assert page.count('src="data:image/jpeg') == 9
